"""Serve bundles over HTTP: OpenAI's Images API, jobs with progress, metrics, and a page.

`app.create_app` is the ASGI application; `ldm serve` runs it. No model is in the process that
answers HTTP: requests are checked and queued there, and executors run them in workers.
"""
