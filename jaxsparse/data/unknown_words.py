# SPDX-License-Identifier: Apache-2.0
"""What of a text a model can't know, as its tokenizer has no token for it."""

from collections.abc import Callable

from jaxsparse.config.errors import UserError
from jaxsparse.data.tokenizer import Tokenizer

# So many are named.
_MOST = 5


def tell(
  tokenizer: Tokenizer, text: str, name: str, say: Callable[[str], None]
) -> None:
  """Says which words of a text count as one and the same unknown word.

  Args:
    tokenizer: of the model.
    text: that is given to it.
    name: of the flag with the text.
    say: gets the sentence.

  Raises:
    UserError: there are no others.
  """
  unknown = tokenizer.unknown(text)
  if not unknown:
    return
  words = list(dict.fromkeys(unknown))
  named = ', '.join(map(repr, words[:_MOST]))
  if len(words) > _MOST:
    named += f' and {len(words) - _MOST:,} more'
  if len(unknown) == len(tokenizer.encode(text)):
    raise UserError(
      f"{name} must hold words that this model's tokenizer knows, got none: "
      f'{named}.'
    )
  say(
    f"{name} holds words that this model's tokenizer does not know, all one to "
    f'it: {named}.'
  )
