"""A rank whose forked children fail, end and outlive it."""

import multiprocessing
import os
import sys
import time

from llama import Llama

llm = Llama.build(sys.argv[1], None, 64, dtype="float32", device="cpu")
tokens = llm.generate([[1, 2, 3]], 5, temperature=0)[0]
context = multiprocessing.get_context("fork")


def use():
    try:
        llm.generate([[1, 2, 3]], 5, temperature=0)
    except RuntimeError as error:
        sys.exit("forked from a rank" in str(error) and 7)


def code(process):
    process.join(20)
    return process.exitcode


def forked(action):
    pid = os.fork()
    if pid == 0:
        action()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


with context.Pool(2) as pool:
    assert pool.map(abs, [-1, 2, -3]) == [1, 2, 3]
pool.join()
sleeper, user = context.Process(target=time.sleep, args=(60,)), context.Process(target=use)
sleeper.start()
sleeper.terminate()
user.start()
assert (code(sleeper), code(user)) == (-15, 7)
assert forked(sys.exit) == 0
assert forked(lambda: [][0]) == 1  # uncaught in the child: not the rank's failure
time.sleep(1)  # two heartbeats
assert llm.generate([[1, 2, 3]], 5, temperature=0)[0] == tokens
print("finished")
