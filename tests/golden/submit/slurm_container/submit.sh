#!/bin/bash
# Submits the jobs beside it, once, and keeps their ids in jobs.txt.
set -eo pipefail
cd -- "$(dirname -- "$0")"
set -o noclobber
: > jobs.txt
job_1=$(sbatch --parsable base.sbatch)
job_1=${job_1%%;*}  # of several clusters, the name comes after the id
echo base "$job_1" >> jobs.txt
job_2=$(sbatch --parsable --dependency=afterok:"$job_1" --kill-on-invalid-dep=yes sft.sbatch)
job_2=${job_2%%;*}  # of several clusters, the name comes after the id
echo sft "$job_2" >> jobs.txt
job_3=$(sbatch --parsable --dependency=afterok:"$job_2" --kill-on-invalid-dep=yes reward.sbatch)
job_3=${job_3%%;*}  # of several clusters, the name comes after the id
echo reward "$job_3" >> jobs.txt
job_4=$(sbatch --parsable --dependency=afterok:"$job_2" --kill-on-invalid-dep=yes dpo.sbatch)
job_4=${job_4%%;*}  # of several clusters, the name comes after the id
echo dpo "$job_4" >> jobs.txt
job_5=$(sbatch --parsable --dependency=afterok:"$job_3" --kill-on-invalid-dep=yes ppo.sbatch)
job_5=${job_5%%;*}  # of several clusters, the name comes after the id
echo ppo "$job_5" >> jobs.txt
