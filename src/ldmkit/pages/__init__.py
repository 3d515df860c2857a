"""Parts of the page of `ldmkit report`: what a directory holds, what it means, and both as HTML."""
