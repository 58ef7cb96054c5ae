#!/bin/bash
set -eo pipefail
cd -- /shared/project
export HF_HUB_OFFLINE=1
export NOTE='it'"'"'s $HOME'
module load cuda
source .venv/bin/activate
# exec, so that the signal to save reaches it
exec python3 -m align run dpo ppo -c align.yaml --run demo --runs runs ppo.kl.coef=0.1 reward.launch.processes=8 reward.launch.strategy=ddp --only reward
