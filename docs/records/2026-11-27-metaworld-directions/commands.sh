# params.yaml: examples/metaworld_objectives.yaml with `iterations: {it001: student, it002: it001, it003: it002, d001: student, d004: it003}`; base,
# student and teacher as that example makes them, at 1c918b8.
B="--set sample.prompts=2 --set sample.group=8"
python -m stages sample --iteration d001 $B; python -m stages label --iteration d001 $B
python -m benchmarks.directions d001 --json start.jsonl
for i in it001 it002 it003; do python -m stages sample --iteration $i; python -m stages label --iteration $i; python -m stages optimize --iteration $i; done
python -m stages sample --iteration d004 $B; python -m stages label --iteration d004 $B
python -m benchmarks.directions d004 --json three-iterations.jsonl
