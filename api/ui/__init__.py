"""The dashboard: `/ui/`. Pages made on the server; scripts only make them quicker.

```
view (views.py)  ─►  route  ─►  endpoint.py: who asks, may they, is it our own page that sends  ─►  a view's handler
handler  ─►  Visit (visit.py): reads as the caller, in a read-only transaction with a time-out  ─►  template  ─►  page
action   ─►  a page that asks for a reason (GET) and does it (POST, then 303): app.js shows it as a dialogue
live     ─►  live.py: the signals of GET /events; app.js reads the page again and changes what differs
```

A view's file holds its handlers and its rows of the table; routes.py puts the rows together.
"""
