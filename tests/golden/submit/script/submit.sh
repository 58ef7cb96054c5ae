#!/bin/bash
# Submits the jobs beside it, once, and keeps their ids in jobs.txt.
set -eo pipefail
cd -- "$(dirname -- "$0")"
set -o noclobber
: > jobs.txt
nohup setsid bash run.sh >> run.log 2>&1 < /dev/null &
echo base "$!" >> jobs.txt
echo sft "$!" >> jobs.txt
echo reward "$!" >> jobs.txt
echo dpo "$!" >> jobs.txt
echo ppo "$!" >> jobs.txt
