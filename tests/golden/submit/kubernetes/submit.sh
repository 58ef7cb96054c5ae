#!/bin/bash
# Submits the jobs beside it, once, and keeps their ids in jobs.txt.
set -eo pipefail
cd -- "$(dirname -- "$0")"
set -o noclobber
: > jobs.txt
kubectl create -f jobset.yaml
echo base demo-20260102-030405 >> jobs.txt
echo sft demo-20260102-030405 >> jobs.txt
echo reward demo-20260102-030405 >> jobs.txt
echo dpo demo-20260102-030405 >> jobs.txt
echo ppo demo-20260102-030405 >> jobs.txt
