"""Answering on one device: many adapters over one frozen base, requests of all of them in the same forward passes.

shelf      which adapters are in memory, and for whom     (event loop)
adapters   their weights in slots, and the hooks that add them, row by row
prompts    a request -> its prompt; prompts -> first logits and keys and values
kv         keys and values of the rows that are being answered
sampling   logits -> the next token; tokens -> text
engine     the thread that joins, steps and retires rows, and what callers await
"""
