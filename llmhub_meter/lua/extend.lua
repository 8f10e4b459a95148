--[[
  More for a hold that lives, and a longer lease.

  KEYS[1] wallet  hash    balance, held, promo, seq
  ARGV[1] request id      ARGV[2] account      ARGV[3] model
  ARGV[4] total in ticks that the hold is to have; 0 renews the lease only
  ARGV[5] smallest total that is of use, where the whole is not there
  ARGV[6] units that the whole total covers
  ARGV[7] lease in milliseconds

  Returns {status, amount, balance, held, promo}; amount is the hold's total afterwards
  status: ok (may be less than asked, never less than the smallest), insufficient (unchanged; lease renewed),
    ended, unknown
]]
--@include partition
--@include entry
--@include expire
local wallet, id, account = KEYS[1], ARGV[1], ARGV[2]
local now = now_ms()
local earlier = redis.call("HGET", HOLDS, id)
local current = 0
if earlier then
  current = tonumber(string.match(earlier, "^(%S+)"))
else
  local ended = redis.call("HGET", done_of(id), id)
  if not ended then return {"unknown", "0", figures(wallet)} end
  if string.match(ended, "^%S+") ~= "expired" then return {"ended", "0", figures(wallet)} end
end

local function grant(total)
  local packed = string.format("%.0f", total)
  redis.call("HSET", HOLDS, id, packed .. " " .. ARGV[6] .. " " .. account .. " " .. ARGV[3])
  redis.call("ZADD", LEASES, string.format("%.0f", now + tonumber(ARGV[7])), id)
  redis.call("HINCRBY", wallet, "held", string.format("%.0f", total - current))
  -- An expired hold that lives again ends again, and that end is the one to remember.
  if not earlier then redis.call("HDEL", done_of(id), id) end
  return {"ok", packed, figures(wallet)}
end

local asked, least = tonumber(ARGV[4]), tonumber(ARGV[5])
if earlier and asked <= current then
  redis.call("ZADD", LEASES, string.format("%.0f", now + tonumber(ARGV[7])), id)
  return {"ok", string.format("%.0f", current), figures(wallet)}
end

local function available()
  local found = redis.call("HMGET", wallet, "balance", "held")
  return tonumber(found[1] or "0") - tonumber(found[2] or "0")
end
local free = available()
if free < asked - current and expire_some(now, 1000, account) > 0 then
  -- The hold itself may have been among the expired.
  if earlier and not redis.call("HGET", HOLDS, id) then
    earlier, current = nil, 0
  end
  free = available()
end
if free >= asked - current then return grant(asked) end
if least > current and free >= least - current then return grant(current + free) end
if earlier then redis.call("ZADD", LEASES, string.format("%.0f", now + tonumber(ARGV[7])), id) end
return {"insufficient", string.format("%.0f", current), figures(wallet)}
