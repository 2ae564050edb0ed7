"""Tune an agent: Bayesian optimisation over its settings, each trial a stack of seeds.

    python hypertune.py                                     two settings of SAC on Pendulum-v1
    python hypertune.py agents/crossq.py --env BipedalWalker-v3 --steps 100_000 --trials 40 \\
        --seeds 3 --space qf_lr=log:1e-4:3e-3 batch_size=int:64:512 policy_delay=cat:1,2,3 \\
        gamma=0.95:0.999 --name study                       run it again to resume
    python hypertune.py agents/ppo.py --help                all flags, with the agent's own
"""

import sys

if __name__ == "__main__":  # trial processes import this file too, but no surrogate
    from lab.options import Tune
    from lab.train import run
    from lab.tuning.run import tune

    sys.exit(run(sys.argv[1:], Tune, tune))
