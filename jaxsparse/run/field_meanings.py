# SPDX-License-Identifier: Apache-2.0
"""What another value of a field means to what was trained with the old one.

Every field of a config, but those that only name the data, is in `MEANINGS`.
The data is known by its content, see `training.resume`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

# Name the text and its split: another name of the same is no change.
TEXT = tuple(
  f'data.{name}'
  for name in (
    'text', 'text_field', 'messages', 'chat_template', 'replay',
    'pairs', 'held_out', 'without', 'image_feature',
    'tfds', 'tfds_feature', 'tfds_train_split',
    'tfds_validation_split', 'split', 'validation_fraction', 'test_fraction',
  )
)  # fmt: skip
# Names the tokenizer, likewise.
TOKENIZER = ('data.tokenizer', 'data.bpe_vocab_size')
LANES = 'data.num_lanes'


@dataclasses.dataclass(frozen=True)
class Meaning:
  """What a change does, or if it is not allowed why."""

  text: str = ''
  is_allowed: bool = True


def _fixed(why: str) -> Meaning:
  return Meaning(why, is_allowed=False)


_FREE = Meaning()
_START = Meaning('without effect: parameters are drawn at step 0 only')
_LOSS = Meaning('the loss from here on')
_RATE = Meaning('the schedule from here on')
_CHANGES = Meaning('how pairs are changed from here on')
_MOMENTS = Meaning('the moments so far stay')
_SHAPES = _fixed('the parameters are others')
_FUNCTION = _fixed('the parameters were trained for another function')
_STATE = _fixed("the optimizer's state is another")
_OTHER_ROWS = _fixed('the rows that are trained would be others')
_ROWS = _fixed('rows would begin at other tokens')

MEANINGS = {
  f'{part}.{name}': meaning
  for part, meaning, names in (
    # Arrays, and what is computed from them.
    ('model', _SHAPES, 'num_layers model_dim num_heads num_kv_heads head_dim'),
    ('model', _SHAPES, 'mlp_dim mlp vocab_size tie_embeddings qk_norm'),
    ('model', _SHAPES, 'norm bias memory moe dcmha sparse'),
    ('model', _FUNCTION, 'attention_pattern window rope_max_wavelength'),
    ('model', _FUNCTION, 'rope_fraction norm_epsilon qk_norm_epsilon'),
    ('model', _FUNCTION, 'parallel_block norm_placement rope_scaling'),
    ('model', _FUNCTION, 'is_causal'),
    ('model', _FREE, 'query_chunk attention_implementation use_remat'),
    ('model', _START, 'init_deviations'),
    ('model', Meaning('the rounding of activations from here on'), 'dtype'),
    # The latter is of decoding.
    ('model', _FREE, 'dropout_rate kv_cache'),
    ('model.rope_scaling', _FUNCTION, 'kind factor original_length'),
    ('model.rope_scaling', _FUNCTION, 'low_frequency_factor'),
    ('model.rope_scaling', _FUNCTION, 'high_frequency_factor'),
    ('model.memory', _SHAPES, 'num_keys key_dim num_heads value_dim expansion'),
    ('model.memory', _SHAPES, 'grid tucker_rank num_cores cores_per_pairing'),
    ('model.memory', _SHAPES, 'split_key_dim query share_keys query_bias'),
    ('model.memory', _SHAPES, 'query_norm key_norm query_conv_taps'),
    ('model.memory', _SHAPES, 'stored_addresses'),
    ('model.memory', _SHAPES, 'pre_value_dim pre_value_map pool_by_block'),
    ('model.memory', _SHAPES, 'output_map gate shared_rows replaces_mlp'),
    ('model.memory', _SHAPES, 'placements'),
    ('model.memory', _FUNCTION, 'num_selected score_activation'),
    ('model.memory', _FUNCTION, 'use_two_quadrants pre_value_activation'),
    ('model.memory', _LOSS, 'aux_loss_weight aux_loss_margin'),
    ('model.memory', _START, 'init'),
    ('model.memory.table', _SHAPES, 'dtype'),
    ('model.memory.table', _FREE, 'scheme gradient'),
    ('model.memory.table', _fixed('the rows lie elsewhere'), 'store'),
    ('model.memory.table', _START, 'init'),
    ('model.moe', _SHAPES, 'num_experts expert_dim num_shared'),
    # Without it there are no biases.
    ('model.moe', _SHAPES, 'bias_update_rate'),
    ('model.moe', _FUNCTION, 'num_experts_per_token router normalize_weights'),
    ('model.moe', _LOSS, 'balance_loss_weight router_z_loss_weight'),
    ('model.dcmha', _SHAPES, 'compose_scores compose_probs query_wise'),
    ('model.dcmha', _SHAPES, 'key_wise base rank num_groups'),
    ('model.dcmha', _FUNCTION, 'gelu'),
    ('model.sparse', _SHAPES, 'router router_heads router_dim combine'),
    ('model.sparse', _FUNCTION, 'block tile window_blocks min_blocks'),
    ('model.sparse', _FUNCTION, 'max_blocks min_fraction max_fraction'),
    ('model.sparse', _FUNCTION, 'use_summaries'),
    ('model.sparse', _LOSS, 'sparsity_loss_weight sparsity_loss_warmup'),
    ('model.sparse', _START, 'coverage_logit'),
    # The latter is of decoding.
    ('model.sparse', _FREE, 'mode history_blocks'),
    # Data.
    ('data', _ROWS, 'seq_len align'),
    (
      'data',
      Meaning(
        'each lane of the data goes on where it stood, so that nothing is read '
        'twice or left out; steps take that many sequences from here on'
      ),
      'batch_size',
    ),
    ('data', Meaning('the mix of rows from here on'), 'replay_share'),
    ('data', _FREE, 'cache_dir prefetch'),
    ('data', _LOSS, 'distractors'),
    ('data.augment', _CHANGES, 'shift crop flip brightness noise unknown'),
    # Pictures.
    ('multimodal', _SHAPES, 'fusion_type num_fusion_layers fused_dim'),
    ('multimodal', _SHAPES, 'contrastive matching_weight'),
    ('multimodal', _SHAPES, 'num_frames frame_choice caption_weight'),
    ('multimodal', _LOSS, 'contrastive_weight'),
    (
      'multimodal',
      Meaning('the frames that are read from here on'),
      'frames_read frame_coverage',
    ),
    ('multimodal.vision', _SHAPES, 'image_size patch_size positions pooling'),
    # Optimizer.
    ('optimizer', _RATE, 'learning_rate warmup_steps final_lr_fraction'),
    ('optimizer', _RATE, 'schedule cooldown_steps constant_lr_fraction'),
    ('optimizer', _RATE, 'anneal_steps'),
    ('optimizer', _RATE, 'value_lr_multiplier value_lr_decay_fraction'),
    ('optimizer', _RATE, 'value_learning_rate'),
    ('optimizer', _MOMENTS, 'b1 b2 epsilon muon_momentum'),
    ('optimizer', _FREE, 'weight_decay clip_norm'),
    (
      'optimizer',
      Meaning('what is trained anew begins with fresh moments'),
      'trained',
    ),
    (
      'optimizer',
      _fixed('rows may wait for the decay of steps that they missed'),
      'value_weight_decay',
    ),
    ('optimizer', _STATE, 'name value_optimizer value_master'),
    ('optimizer', _FREE, 'value_row_budget grad_accumulation'),
    # The rest.
    ('train', Meaning('schedules spread over all steps'), 'num_steps'),
    ('train', _fixed('data and dropout are drawn by the seed'), 'seed'),
    (
      'train',
      _fixed('a run that has begun did so with other parameters'),
      'start_from',
    ),
    ('train', _FREE, 'log_every save_every keep_checkpoints keep_best'),
    ('train', _FREE, 'eval_every'),
    ('train', Meaning('what passes measure from here on'), 'old_text_bytes'),
    ('train', _FREE, 'sample_prompt sample_tokens wandb_project'),
    ('train', _FREE, 'stop_signals'),
    # What is learned beside a base.
    ('adapter', _SHAPES, 'kind rank use_dora targets'),
    ('adapter', _FUNCTION, 'alpha use_rslora quantize'),
    ('adapter', _LOSS, 'dropout'),
    ('adapter', _SHAPES, 'num_rows'),
    ('adapter', _OTHER_ROWS, 'ranking ranking_unit ranking_tokens'),
    ('adapter', _FREE, 'name'),
    ('mesh', _FREE, 'data sparse model'),
  )
  for name in names.split()
}  # fmt: skip

MEANINGS['multimodal'] = _SHAPES
# The picture's stream is another of the same kind.
MEANINGS |= {
  name.replace('model', 'multimodal.vision.stream', 1): meaning
  for name, meaning in MEANINGS.items()
  if name.startswith('model.')
}


# Fields of which some values are alike: what tells those apart that are not, of
# a config and a value, and what a change among those that are means.
_ALIKE: dict[str, tuple[Callable[[Any, Any], Any], Meaning]] = {
  'model.moe.bias_update_rate': (
    lambda config, rate: rate > 0,
    Meaning('the steps of the biases from here on'),
  ),
  'multimodal.matching_weight': (lambda config, weight: weight > 0, _LOSS),
  # The matrix in front of the tokens is that of their embeddings, or one more.
  'multimodal.caption_weight': (
    lambda config, weight: weight > 0 and not config.model.tie_embeddings,
    _LOSS,
  ),
  'multimodal.frame_choice': (
    lambda config, choice: choice == 'routed',
    MEANINGS['multimodal.frames_read'],
  ),
}


def meaning_of(name: str, before: Any, after: Any, config: Any) -> Meaning:
  """Of a change; of a layer's field that is in no list, that it may not be.

  Args:
    name: of the field.
    before: its value.
    after: another one.
    config: that is changed, a `Config`.
  """
  alike = _ALIKE.get(name.replace('multimodal.vision.stream.', 'model.'))
  if alike and alike[0](config, before) == alike[0](config, after):
    return alike[1]
  return MEANINGS.get(name, _SHAPES)
