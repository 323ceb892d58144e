"""Reports: the plan as a table, pictures of graphs."""
