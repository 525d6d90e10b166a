"""`spiketrain dashboard`: the figures of a report, live in the browser, over an MLflow store.

app.py     the server and its answers
guard.py   who may read them
place.py   the address of a view, and the view of an address
live.py    runs as the store has them now
"""
