"""
The chain that chooses for itself: from a checkpoint and prompts to a model that is as good in fewer tokens.

What it does is written down before it is done (the plan, and a recipe for each stage, in `recipes/`), and why afterwards
(`decisions.jsonl`, each with the numbers that it rests on). It trains from the context that promises most, looks at
problems that training has not seen after every round, and stops when there is no more to be had or something is lost. The
verdict is on problems that nothing before it has seen. With `ratio` it goes on to the smallest student that is still as
good, and with `export_formats` to what an engine serves.

`run` says what follows what: `plan` (what is known before anything is loaded: the `division` of the data, and what can `fit`
the devices), `compaction` (a context is chosen, and trained from), `size`, `verdict`, `export`. `runner` runs the stages,
measures, and writes down what is decided.
"""
