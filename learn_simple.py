"""Train an agent: seeds x environments in parallel processes; a process trains a stack of seeds.

    python learn_simple.py                                  SAC on Pendulum-v1, a quick check
    python learn_simple.py --log --seeds 8 --name "testing X"
    python learn_simple.py agents/mine.py --env HalfCheetah-v5 Hopper-v5 --steps 100_000 --log
    python learn_simple.py agents/crossq.py --env Ant-v5 --seeds 8 --plan --log
    python learn_simple.py agents/ppo.py --help             all flags, with the agent's own
"""

import sys

from lab import train

if __name__ == "__main__":
    sys.exit(train.run(sys.argv[1:]))
