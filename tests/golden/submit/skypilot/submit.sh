#!/bin/bash
# Submits the jobs beside it, once, and keeps their ids in jobs.txt.
set -eo pipefail
cd -- "$(dirname -- "$0")"
set -o noclobber
: > jobs.txt
cd -- /shared/project  # where workdir starts from
sky jobs launch --yes --detach-run --name demo-20260102-030405 --secret HF_TOKEN /shared/project/runs/demo/submit/20260102-030405-skypilot/pipeline.yaml
cd -- "$OLDPWD"
echo base demo-20260102-030405 >> jobs.txt
echo sft demo-20260102-030405 >> jobs.txt
echo reward demo-20260102-030405 >> jobs.txt
echo dpo demo-20260102-030405 >> jobs.txt
echo ppo demo-20260102-030405 >> jobs.txt
