"""The one exception that stands for bad input."""


class UserError(ValueError):
  """Bad input: one sentence that names the field, its value and what is right.

  Entry points print the sentence and exit with 2; every other exception is a
  defect of jaxsparse and keeps its traceback.
  """
