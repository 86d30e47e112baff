"""The smallest valid `params.yaml`."""

MINIMAL = """
run: {name: test}
environment: {family: metaworld, tasks: [reach-v3]}
demonstrations: {main: {episodes: 2}}
pretrained: {teacher: {demonstrations: main, steps: 3, learning_rate: 1.0e-3}}
finetuned:
  student: {parent: teacher, demonstrations: main, per_task: 1, steps: 3, learning_rate: 1.0e-3}
iterations: {it001: student, it002: it001}
evaluations: {start: student, final: it002}
report: {teacher: start}
"""
