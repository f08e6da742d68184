# SPDX-License-Identifier: Apache-2.0
"""Four made-up people: people.jsonl to learn them from, questions.jsonl."""

import json
import pathlib

import numpy as np

from jaxsparse.data import facts

people, rng = facts.make_people(4, seed=0), np.random.default_rng(0)
with pathlib.Path('people.jsonl').open('w') as file:
  for person in rng.permutation(np.repeat(np.arange(4), 32)).tolist():
    file.write(json.dumps(dict(text=people.biography(person, rng))) + '\n')
with pathlib.Path('questions.jsonl').open('w') as file:
  for question in people.questions():
    context = question.before.removeprefix('.\n').rstrip()
    asked = dict(context=context, continuation=f' {question.answer}')
    file.write(json.dumps(asked) + '\n')
