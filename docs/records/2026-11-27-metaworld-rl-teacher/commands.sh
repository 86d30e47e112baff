# params.yaml: examples/metaworld_rl_teacher.yaml; small_batches/params.yaml the same with smaller batches of GRPO, tried first. At 81488d9.
opd run   # the evaluations, in *.jsonl
# Does an update of GRPO raise success where it has learnt? The first iteration's rollouts, 90 steps on them in place of 15, and the same placements once
# more with what came of it: same_placements.jsonl, successes of eight episodes from each, before and after.
python -m stages reinforce --iteration rl001   # with reinforce.steps 90
mv artifacts/metaworld-rl-teacher/trajectories/rl001 before
rm -r artifacts/metaworld-rl-teacher/checkpoints/supervised
cp -r artifacts/metaworld-rl-teacher/checkpoints/rl001 artifacts/metaworld-rl-teacher/checkpoints/supervised
python -m stages explore --iteration rl001
