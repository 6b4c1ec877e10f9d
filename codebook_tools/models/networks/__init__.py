"""The networks of the families, with encode, walk and decode; the caller of walk quantizes."""
