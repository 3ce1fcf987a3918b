"""Turn text into indexed datasets, with a package for each stage.

reading -> tokenizers -> indexed -> cleaning -> preprocessing -> mixing: each uses only those before
it, and file_names.py and progress.py.
"""
