"""`spiketrain dashboard`: a report's figures, live in the browser, read from an MLflow store.

app.py     the server and its endpoints
guard.py   access control
permalink.py the mapping between a URL and a view
live.py    the current runs of the store
"""
