--[[
  Give a whole hold back: nothing is charged.

  KEYS[1] wallet  hash    balance, held, promo, seq
  ARGV[1] request id      ARGV[2] account      ARGV[3] record, JSON

  Returns {status, how, charge, balance, held, promo}
  status: ok, exists (it ended before: how), marked (never seen: a reserve that comes later is refused)
]]
--@include partition
--@include entry
local wallet, id = KEYS[1], ARGV[1]
local packed = redis.call("HGET", HOLDS, id)
if packed then
  local amount = string.match(packed, "^(%S+)")
  end_hold(wallet, id, amount)
  local balance = redis.call("HGET", wallet, "balance") or "0"
  local entry = append(wallet, ARGV[2], id, "release", "0", "0", amount, "0", balance, ARGV[3])
  remember(id, "released 0 " .. entry)
  return {"ok", "released", "0", figures(wallet)}
end

local ended = redis.call("HGET", done_of(id), id)
if ended then
  local how, charge = string.match(ended, "^(%S+) (%S+)")
  return {"exists", how, charge, figures(wallet)}
end
remember(id, "released 0 -")
return {"marked", "released", "0", figures(wallet)}
