#!/bin/bash
# Submits the jobs beside it, once, and keeps their ids in jobs.txt.
set -eo pipefail
cd -- "$(dirname -- "$0")"
set -o noclobber
: > jobs.txt
ray job submit --no-wait --address=http://head:8265 --submission-id=demo-20260102-030405 --entrypoint-num-gpus=8 --entrypoint-num-cpus=64 --entrypoint-memory=549755813888 --verify=false -- bash /shared/project/runs/demo/submit/20260102-030405-ray/run.sh
echo base demo-20260102-030405 >> jobs.txt
echo sft demo-20260102-030405 >> jobs.txt
echo reward demo-20260102-030405 >> jobs.txt
echo dpo demo-20260102-030405 >> jobs.txt
echo ppo demo-20260102-030405 >> jobs.txt
