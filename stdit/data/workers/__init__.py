"""Decodes in worker processes: the pool in the parent, and the child that decodes, without torch and pyarrow. Imports
decode and measure."""
