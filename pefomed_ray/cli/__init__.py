"""The command line: parse, call one room, print where the artifact is."""
