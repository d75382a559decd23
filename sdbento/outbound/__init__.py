"""The only opener of URLs that come with requests: pictures, LoRAs, webhooks, buckets.

    urls -> names -> places -> http

Such a URL may point at what only this server can reach: its own ports, its neighbours, its cloud's
metadata. So a host is resolved once, all its addresses are checked, and the connection goes to one
of those that were checked; redirects are checked in the same way. No proxy, cookie or credential is
used. And its host may be slow on purpose: nobody waits for the host of somebody else.
"""
