"""The command line: one file a verb, nothing but arguments in and tables out."""
