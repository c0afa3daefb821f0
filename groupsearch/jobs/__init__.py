"""Profile, fit, search, train and verify: a typed request in, a typed document out.

A job prints nothing: it tells what goes on through the request's ``notify``. Ctrl-C ends it with
:class:`~groupsearch.jobs.events.Interrupted`, which has the document of what was done.
"""
