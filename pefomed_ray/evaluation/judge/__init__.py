"""A language model as judge: is an answer right, how good is a report. Every verdict is scored or says why not.

`run.judge_rows` judges predictions; what it asks is in `prompts`, how a reply is read in `parse`.
"""
