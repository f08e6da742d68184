# SPDX-License-Identifier: Apache-2.0
"""A plain dense transformer in PyTorch, of the sizes of one of ours.

What somebody who knows PyTorch would write: fused AdamW, its own attention and
norms, a tied head. The maths of `nn.transformer` with the MLP 'swiglu' and one
document a sequence.
"""

from collections.abc import Callable
from typing import Any

from jaxsparse.config import ModelConfig, OptimizerConfig


def make_model(config: ModelConfig) -> Any:
  """The model with random weights, a `torch.nn.Module`.

  Its call takes tokens [B, T] and earlier keys and values, by default none, a
  list of [B, N, S, H] pairs with room and the number of rows in use, and
  returns the normalised residual stream [B, T, D].
  """
  import torch
  from torch import nn
  from torch.nn import functional as F

  D, N, H = config.model_dim, config.num_heads, config.head_dim

  def rotation(first: int, length: int):
    exponent = torch.arange(H // 2) / (H // 2)
    frequency = config.rope_max_wavelength**-exponent
    angle = torch.arange(first, first + length)[:, None] * frequency
    return angle.cos(), angle.sin()

  def rotate(x, cos, sin):
    left, right = x.chunk(2, -1)
    turned = (left * cos - right * sin, right * cos + left * sin)
    return torch.cat(turned, -1)

  class Block(nn.Module):
    def __init__(self):
      super().__init__()
      self.attention_norm = nn.RMSNorm(D, config.norm_epsilon)
      self.mlp_norm = nn.RMSNorm(D, config.norm_epsilon)
      self.heads = nn.Linear(D, 3 * N * H, bias=False)
      self.output = nn.Linear(N * H, D, bias=False)
      self.gate = nn.Linear(D, config.mlp_dim, bias=False)
      self.up = nn.Linear(D, config.mlp_dim, bias=False)
      self.down = nn.Linear(config.mlp_dim, D, bias=False)

    def forward(self, x, turn, cache, first):
      B, T, _ = x.shape
      heads = self.heads(self.attention_norm(x)).view(B, T, 3, N, H)
      query, key, value = heads.permute(2, 0, 3, 1, 4)
      query, key = rotate(query, *turn), rotate(key, *turn)
      if cache is not None:
        for kept, new in zip(cache, (key, value), strict=True):
          kept[:, :, first : first + T] = new
        key, value = (kept[:, :, : first + T] for kept in cache)
      # A prompt sees what is before it; one new token sees all.
      read = F.scaled_dot_product_attention(query, key, value, is_causal=T > 1)
      x = x + self.output(read.transpose(1, 2).reshape(B, T, N * H))
      y = self.mlp_norm(x)
      return x + self.down(F.silu(self.gate(y)) * self.up(y))

  class Dense(nn.Module):
    def __init__(self):
      super().__init__()
      self.table = nn.Embedding(config.vocab_size, D)
      nn.init.normal_(self.table.weight, std=D**-0.5)
      self.blocks = nn.ModuleList(Block() for _ in range(config.num_layers))
      self.norm = nn.RMSNorm(D, config.norm_epsilon)

    def forward(self, tokens, caches=None, first=0):
      x = self.table(tokens)
      turn = rotation(first, tokens.shape[1])
      for i, block in enumerate(self.blocks):
        x = block(x, turn, caches and caches[i], first)
      return self.norm(x)

    def logits(self, x):
      return F.linear(x, self.table.weight)

  return Dense()


def make_step(
  model: Any, config: OptimizerConfig, is_compiled: bool
) -> Callable:
  """A training step of tokens and targets [B, T] that returns the loss."""
  import torch
  from torch.nn import functional as F

  optimizer = torch.optim.AdamW(
    model.parameters(),
    lr=config.learning_rate,
    betas=(config.b1, config.b2),
    weight_decay=config.weight_decay,
    fused=True,
  )

  def forward(tokens, targets):
    logits = model.logits(model(tokens))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

  forward = torch.compile(forward) if is_compiled else forward

  def step(tokens, targets):
    optimizer.zero_grad(set_to_none=True)
    loss = forward(tokens, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    optimizer.step()
    return loss

  return step
