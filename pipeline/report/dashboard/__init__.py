"""`spiketrain dashboard`: the figures of a report for the current runs of an MLflow store.

app.py        the server and its endpoints
guard.py      access control
permalink.py  the mapping between a URL and a view
live.py       the current runs of the store
"""
