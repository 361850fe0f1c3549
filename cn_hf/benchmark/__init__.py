"""How fast context normalization is, against what it replaces: ratios measured side by side, in turn, in one run.

``command`` has the options, ``program`` runs the sections one after the other, each a module of its own: ``ops``,
``plus``, ``mixture``, ``models``, ``scale``, ``pipeline`` and ``networks``. A section plans trials (``trials``), each
with the rows it will fill (``rows``), measured by ``timing``; ``report`` and ``picture`` write what was found.
"""
