"""Index a git repository: which files it has, and which functions, classes, methods and constants they define.

```
app.py      the job: its stages, what survives a killed worker
git.py      a path or URL → a commit → its files and their contents
files.py    one file → language, lines, symbols, or why it is skipped
symbols.py  Python through ast        grammars.py  other languages through tree-sitter
store.py    the tables of the index (schema code_index)
```
"""
