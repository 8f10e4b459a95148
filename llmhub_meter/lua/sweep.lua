--[[
  Return the holds of a partition whose leases ran out.

  KEYS[1] leases  sorted set    request id by expiry
  ARGV[1] most holds to return in this call

  Returns the number of holds returned.
]]
--@include partition
--@include entry
--@include expire
return expire_some(now_ms(), tonumber(ARGV[1]))
