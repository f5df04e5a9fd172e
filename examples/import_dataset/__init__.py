"""Import a dataset: a CSV or Excel file that a user has uploaded becomes a table of typed columns.

```
app.py      receive() takes an upload and sends the job, in one transaction; the job: six stages
sheet.py    a file → its columns and rows, or why it cannot be used
kinds.py    which kind of values a column has
store.py    the tables (schema imports), and the folder of the files
active.py   what a user sees: their jobs that run, or have just ended
sample.py   makes files to try it with
```
"""
