"""Self-contained HTML pages: one file that needs no network, made of figures (JSON), tables (HTML) and the scripts of this folder.

Only numbers and texts go in, and every text is escaped. A Content-Security-Policy names the hashes of the page's own script and style
sheet, so that a browser runs and fetches nothing else.
"""
