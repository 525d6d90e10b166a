"""`spiketrain dashboard`: the figures of a report, live in the browser, over an MLflow store.

serve.py     the server, and whom it answers (guard.py)
app.py       what calls what: the layout and its callbacks
scripts.py   what the page does by itself, in JavaScript
place.py     what an address shows, and the address of what is shown
parts.py     the list of studies and the figures of one, as HTML (blocks.py)
"""
