"""Process a document: what it says, in which passages, and who is in it.

```
app.py      the job: seven stages, what survives a killed worker, where it can be paused
pdf.py      a PDF file → the text of its pages, or why a page cannot be read
text.py     pages → one text → overlapping passages
vectors.py  a passage → a vector, by hashing its words and their parts
names.py    a passage → names; all names → who is meant by which
store.py    the tables of the results (schema documents)
sample.py   makes a PDF to try it with
```
"""
