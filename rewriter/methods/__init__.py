"""The methods of the literature, each a transform: its expression, and its schedule where it has one.

Files register themselves when the registry is read; nothing else imports them. Equations are of arXiv 2407.05417v2.
"""
