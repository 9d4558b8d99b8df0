"""The commands `stdit data …`: scan, caption, plan, encode, toy."""
