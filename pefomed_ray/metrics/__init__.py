"""Strings and numbers in, numbers out: answer matching, lexical overlap, intervals. Neither torch nor Ray."""
