"""Train an agent on many environments per seed, in one process, on the CPU or on a GPU.

    python learn_vectorised.py                              PPO on 32 cart-poles, writes no files
    python learn_vectorised.py --log --cuda
    python learn_vectorised.py agents/ppo.py --env BipedalWalker-v3 --num-envs 32 --plan --log
    python learn_vectorised.py agents/sac.py --env HalfCheetah-v5 --num-envs 8 --seeds 4 \\
        --backend workers --workers 2 --replay-ratio 0.25 --log
"""

import os
import sys

if __name__ == "__main__":  # workers import this file too, but need none of this
    # Torch reads this when it is imported. Threads that spin while they wait slow a busy machine:
    # PPO with two threads on 2 cores at load 9 was over 10 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from lab.options import Vectorised
    from lab.train import run

    sys.exit(run(sys.argv[1:], Vectorised))
