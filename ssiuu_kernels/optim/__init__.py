"""The penalty, alone and fused with AdamW, and the steering of lambda."""
