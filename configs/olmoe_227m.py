"""OLMoE 227M/1.2B: 64 experts, 8 of them active.

  python train.py --config=configs/olmoe_227m.py \\
    --config.data.tfds=lm1b --workdir=gs://...

Reproduces: the OLMoE row of the open 227M/1.2B family in arXiv:2508.18756,
Table 10: 1.18B parameters without embeddings. The family reads 768 sequences of
4,096 tokens a step and 5e11 tokens of the OLMoE mix with the GPT-NeoX
tokenizer. OLMoE's losses: balance 0.01, router z-loss 1e-3, weights not
renormalised (arXiv:2409.02060).
Hardware: an accelerator pod; traced for 4,096 devices, not yet trained by us.
Result: none measured.
"""

from jaxsparse import config as c


def get_config() -> c.Config:
  return c.Config(
    model=c.ModelConfig(
      num_layers=20,
      model_dim=768,
      num_heads=12,
      num_kv_heads=12,
      head_dim=64,
      mlp_dim=3072,
      mlp='swiglu',
      vocab_size=50_304,
      dtype='bfloat16',
      use_remat=True,
      moe=c.MoEConfig(
        num_experts=64, num_used=8, expert_dim=384, normalize_weights=False
      ),
    ),
    data=c.DataConfig(
      tokenizer='bpe', bpe_vocab_size=50_277, seq_len=4096, batch_size=768
    ),
    optimizer=c.OptimizerConfig(learning_rate=4e-4, warmup_steps=3179),
    train=c.TrainConfig(
      num_steps=158_946, save_every=1000, eval_every=5000, sample_prompt='The '
    ),
  )
