"""What is built for whom, and the tools that check, index and publish it. Not part of the installed package."""
