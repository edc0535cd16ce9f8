"""The ten most negative MLP neurons of a batch."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ssiuu_kernels as sk

sizes = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 99,
}
model = LlamaForCausalLM(LlamaConfig(**sizes))  # or AutoModelForCausalLM.from_pretrained(...)
input_ids = torch.randint(99, (4, 16))
labels = input_ids.masked_fill(torch.arange(16) < 8, -100)  # the second half is the answer
with sk.patch(model) as handle:
    found = handle.attribute({"input_ids": input_ids, "labels": labels}, target="log_prob")
lowest = torch.stack([kinds["h"].min.amin(0) for kinds in found.values()])  # [layers, F]
for place in lowest.flatten().argsort()[:10].tolist():
    layer, neuron = divmod(place, lowest.shape[1])
    print(f"{list(found)[layer]}  neuron {neuron:5d}  {lowest[layer, neuron]:.3e}")
