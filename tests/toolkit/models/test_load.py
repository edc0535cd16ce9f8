"""Loading models, and refusing what does not fit."""

import json
import shutil

import pytest
import torch
import transformers

from ssiuu.attacks.attack import Attack
from ssiuu.commands.attack import attack_run
from ssiuu.commands.diagnose import diagnose_runs
from ssiuu.commands.evaluate import evaluate_run
from ssiuu.commands.finetune import finetune
from ssiuu.commands.unlearn import unlearn
from ssiuu.data.prompts import PromptFormat
from ssiuu.evaluation.likelihood import score_facts
from ssiuu.models.load import load_model, position_limit
from ssiuu.options import FinetuneOptions


def test_a_folder(model_dir):
    model, tokenizer = load_model(model_dir, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert tokenizer("rome").input_ids


def test_unknown_dtype(model_dir):
    with pytest.raises(ValueError, match="dtype='float8'"):
        load_model(model_dir, dtype="float8")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="is not a model folder"):
        load_model(tmp_path)


def changed_config(model_dir, tmp_path, **changes):
    folder = tmp_path / "changed"
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_a_checkpoint_of_another_depth(model_dir, tmp_path):
    with pytest.raises(ValueError, match="does not fit"):
        load_model(changed_config(model_dir, tmp_path, num_hidden_layers=3))


def test_a_checkpoint_of_another_width(model_dir, tmp_path):
    with pytest.raises(ValueError, match="does not fit"):
        load_model(changed_config(model_dir, tmp_path, intermediate_size=64))


LIMITS = {
    "gpt2": (transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=12), 12),
    "opt": (
        transformers.OPTConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8, word_embed_proj_dim=8,
            max_position_embeddings=12,
        ),
        12,
    ),
    "roberta": (
        transformers.RobertaConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
            max_position_embeddings=12, is_decoder=True,
        ),
        10,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "limit"), LIMITS.values(), ids=LIMITS)
def test_learned_positions_are_a_limit(config, limit):
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert position_limit(model) == limit
    with torch.no_grad():
        model(input_ids=torch.full((1, limit), 3))
        with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
            model(input_ids=torch.full((1, limit + 1), 3))


def test_positions_of_a_picture_are_no_limit(loaded):
    loaded[0].vision_tower = torch.nn.ModuleDict({"position_embedding": torch.nn.Embedding(3, 2)})
    assert position_limit(loaded[0]) is None


def test_rotary_positions_are_none(loaded):
    assert position_limit(loaded[0]) is None


def test_a_pad_token_that_the_model_has_no_row_for(model_dir, tmp_path, facts):
    folder = changed_config(model_dir, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    model, tokenizer = load_model(folder)
    plain = load_model(model_dir)
    found, expected = (score_facts(m, PromptFormat(t, 0), facts) for m, t in ((model, tokenizer), plain))
    assert torch.equal(found.margin, expected.margin)


def test_a_model_that_needs_a_package(model_dir, monkeypatch):
    def need(*_, **__):
        raise ImportError("the SentencePiece library was not found")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", need)
    with pytest.raises(ValueError, match=f"model {model_dir} needs a package: the SentencePiece library"):
        load_model(model_dir)


CONTRADICTORY = {"do_sample": False, "temperature": 0.6, "top_p": 0.9}


def refuse_contradictions(config, folder, **_):
    """What transformers 4 does."""
    if config.temperature not in (None, 1.0) and not config.do_sample:
        raise ValueError("`temperature` is set to 0.6, but `do_sample` is False")


@pytest.mark.parametrize("old", [False, True], ids=["as it is", "as transformers 4"])
def test_a_generation_config_that_cannot_be_saved_ends_no_run(options, model_dir, tmp_path, monkeypatch, caplog, old):
    folder = changed_config(model_dir, tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({**CONTRADICTORY, "eos_token_id": [1, 2]}))
    if old:
        monkeypatch.setattr(transformers.GenerationConfig, "save_pretrained", refuse_contradictions)
    run = unlearn(options.replace(model=str(folder), max_steps=2, save_every=1), tmp_path / "run")
    assert run.read("config.json")["status"] == "complete"
    model, _ = load_model(folder)
    assert model.generation_config.eos_token_id == [1, 2]
    said = [record.message for record in caplog.records if "cannot be saved" in record.message]
    assert bool(said) == old or transformers.__version__.startswith("4.")


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_with_code_of_its_own_goes_through_all_commands(options, model_dir, facts_file, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    codes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    folder = changed_config(model_dir, tmp_path, model_type="own", architectures=["OwnModel"], auto_map=codes)
    (folder / "own.py").write_text(REMOTE)
    common = {"model": str(folder), "trust_remote_code": True}
    with pytest.raises(ValueError, match="could not be loaded"):
        load_model(folder)
    taught = finetune(FinetuneOptions(facts=str(facts_file), steps=1, **common), tmp_path / "taught")
    run = unlearn(options.replace(max_steps=1, **{**common, "model": str(taught.model)}), tmp_path / "run")
    assert len(attack_run(run.path, [Attack("harmful", 0.3, 1e-3, pool="all", steps=1)])) == 1
    assert evaluate_run(run.path)["after"]
    assert diagnose_runs([run.path])


def test_a_hub_name_out_of_reach(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"model no-one/nothing could not be loaded: .*expected a hub name"):
        load_model("no-one/nothing")


def test_a_file_of_weights_that_was_cut_off(model_dir, tmp_path):
    file = changed_config(model_dir, tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"model {file.parent} could not be loaded: .*complete safetensors"):
        load_model(file.parent)


def test_attention_is_the_one_that_was_asked_for(model_dir):
    for name in ("eager", "sdpa"):
        model, _ = load_model(model_dir, attn_implementation=name)
        assert model.config._attn_implementation == name


def test_an_unknown_attention_is_refused(model_dir):
    with pytest.raises(ValueError, match=r"could not be loaded: .*magic"):
        load_model(model_dir, attn_implementation="magic")


@pytest.mark.parametrize("name", ["auto", None])
def test_a_device_map_of_one_device_trains(options, tmp_path, name):
    run = unlearn(options.replace(max_steps=1, device_map=name), tmp_path / "run")
    assert run.read("config.json")["device_map"] == name


def test_a_device_map_that_offloads_is_refused(model_dir):
    with pytest.raises(ValueError, match=r"device_map='meta' puts weights on meta; expected all on \w+(:\d)?, since"):
        load_model(model_dir, device_map="meta")


@pytest.mark.parametrize("name", ["folder", "smollm2"])
def test_a_revision_of_a_local_model_is_refused(model_dir, monkeypatch, name):
    monkeypatch.setattr("ssiuu.models.load.packaged_model", lambda: model_dir)
    with pytest.raises(ValueError, match=r"revision='main' of .*, which is local; expected a hub name, or no revision"):
        load_model(model_dir if name == "folder" else name, revision="main")


def test_a_revision_reaches_the_hub(model_dir, monkeypatch):
    asked = []

    def downloading(load):
        def download(name, *, revision, **options):
            asked.append((name, revision))
            return load(model_dir, **options)

        return download

    for loader in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(loader, "from_pretrained", downloading(loader.from_pretrained))
    load_model("somebody/model", revision="v2")
    assert asked == [("somebody/model", "v2")] * 2


COMMANDS = {
    "evaluate": (evaluate_run, (1, 1)),
    "diagnose": (lambda folder: diagnose_runs([folder]), (1, 1)),
    "attack": (lambda folder: attack_run(folder, [Attack("harmful", 0.3, 1e-3, pool="all", steps=1)]), (0, 2)),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_load_models_as_the_run_did(options, tmp_path, monkeypatch, command):
    call, (of_base, of_unlearned) = COMMANDS[command]  # how often it loads each
    run = unlearn(options.replace(max_steps=1), tmp_path / "run")
    recorded = {"revision": "v2", "attn_implementation": "eager", "device_map": None, "trust_remote_code": True}
    run.write("config.json", {**run.read("config.json"), **recorded})
    loaded = []

    def load(name, **how):
        loaded.append((str(name), how))
        return load_model(name, **{**how, "revision": None})

    monkeypatch.setattr(f"ssiuu.commands.{command}.load_model", load)
    call(run.path)
    how = {**recorded, "dtype": "float32"}
    base, unlearned = (options.model, how), (str(run.model), {**how, "revision": None})
    assert loaded == [base] * of_base + [unlearned] * of_unlearned
