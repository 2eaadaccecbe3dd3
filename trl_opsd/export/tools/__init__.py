"""
Programs that run in the environments of converters and engines: each imports what its environment has, and nothing of this
package. They are given a JSON file and leave one.

`convert`: `checkpoint` (folder, in float32), `output` (an empty folder), `precision`; `unquantised`, the folder of an
earlier conversion, where there is one; `options`, what else the tool needs to know.

`generate`: `artefact` (folder), `texts` to tokenise, `conversations` to render, `prompts` (token ids, and how many tokens
may follow), `is_exact` (whether to compute in float32). What is left are the fields of [`~trl_opsd.export.Answer`].
"""
