"""Models split over different numbers of ranks take turns."""

import sys

from llama import Llama


def build(size):
    return Llama.build(
        sys.argv[1], None, 64, model_parallel_size=size, dtype="float32", device="cpu"
    )


def tokens(llm):
    return llm.generate([[1, 2, 3], [4]], 8, temperature=0, logprobs=True)[0]


two = build(2)
expected = tokens(two)
one = build(1)
assert tokens(one) == expected
assert tokens(two) == expected
assert tokens(build(2)) == expected
assert tokens(one) == expected
print("finished")
