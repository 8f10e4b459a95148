--[[
  Change an account or an API key, with a signup grant where an account is opened.

  KEYS[1] wallet    hash    balance, held, promo, seq, and the account's own fields
  KEYS[2] target    hash    what changes: the wallet again, or a key's record
  KEYS[3] index     set     the partition's accounts, or the account's keys
  KEYS[4] credited  hash    credit id -> amount, code, balance after it
  ARGV[1] change id         ARGV[2] account      ARGV[3] code: account, key
  ARGV[4] "new" (must not exist yet) or "known" (must exist)
  ARGV[5] record, JSON
  ARGV[6] member for the index, or ""            ARGV[7] signup grant in ticks, or "0"
  ARGV[8...] field, value, field, value ...

  Returns {status, balance, held, promo}; status: ok, exists, no_account, unknown
]]
--@include partition
--@include entry
local wallet, target, id, account, code = KEYS[1], KEYS[2], ARGV[1], ARGV[2], ARGV[3]
if redis.call("HEXISTS", done_of(id), id) == 1 then return {"ok", figures(wallet)} end

local opening = code == "account" and ARGV[4] == "new"
if not opening and redis.call("EXISTS", wallet) == 0 then return {"no_account", "0", "0", "0"} end
local known = redis.call("EXISTS", target) == 1
if ARGV[4] == "new" and known then return {"exists", figures(wallet)} end
if ARGV[4] == "known" and not known then return {"unknown", figures(wallet)} end

local fields = {}
for i = 8, #ARGV do fields[#fields + 1] = ARGV[i] end
redis.call("HSET", target, unpack(fields))
if opening then
  redis.call("HSET", wallet, "balance", "0", "held", "0", "promo", "0", "seq", "0")
end
if ARGV[6] ~= "" then redis.call("SADD", KEYS[3], ARGV[6]) end
local balance = redis.call("HGET", wallet, "balance")
local entry = append(wallet, account, id, code, "0", "0", "0", "0", balance, ARGV[5])
remember(id, "changed 0 " .. entry)

if opening and ARGV[7] ~= "0" then
  local grant = "grant:signup:" .. account
  redis.call("HINCRBY", wallet, "balance", ARGV[7])
  redis.call("HINCRBY", wallet, "promo", ARGV[7])
  redis.call("HSET", KEYS[4], grant, ARGV[7] .. " grant " .. ARGV[7])
  append(wallet, account, grant, "grant", ARGV[7], ARGV[7], "0", "0", ARGV[7], "{}")
end
return {"ok", figures(wallet)}
