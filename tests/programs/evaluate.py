"""``python -m llama`` without reading the harness's own tasks, which takes seconds."""

import functools

import lm_eval.tasks

from llama.__main__ import main

lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
main()
